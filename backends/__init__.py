"""The backends: one file or folder each, and the stages that several share. Found through the registry."""
