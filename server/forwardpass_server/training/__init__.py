"""Training: client updates that run optimizer steps on the server, and publish the trained weights."""
