"""The operating system below the package: files, signals, installed libraries, exceptions."""
