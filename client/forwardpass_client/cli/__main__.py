"""`python -m forwardpass_client.cli`."""

from forwardpass_client.cli import main

main()
