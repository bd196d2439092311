"""Joins the rooms into a program: settings, the command line, start and end."""
