"""The protocol of forwardpass: its messages and their codec."""
