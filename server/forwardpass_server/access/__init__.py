"""Access control: authentication of callers and their roles."""
