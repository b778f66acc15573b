"""The processes of one run: who each is, what they hand each other, and what they must agree on."""
