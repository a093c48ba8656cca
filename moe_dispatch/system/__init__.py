"""What the package needs of the operating system: files, signals, libraries, provenance."""
