"""A SARM as the reward of frameworks that train policies: one file each, in process or by a server."""
