"""How weights get from the policy's stream into servers."""
