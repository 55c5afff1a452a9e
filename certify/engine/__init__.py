"""Monte-Carlo sampling on a device: the vote loop, sequential sampling, execution settings."""
