"""Config models, one file a section, and the YAML loader."""
