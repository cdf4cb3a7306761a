"""Hosts: which there are, whether they are fit, and launching on them."""
