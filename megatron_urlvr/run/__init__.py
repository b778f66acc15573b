"""A run on disk: its folder and files, where it comes from, how it ends and goes on."""
