"""One compression run: blocks worked off one by one, targets, resume, and what is written."""
