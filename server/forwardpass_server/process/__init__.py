"""What looks after the process."""
