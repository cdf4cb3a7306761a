"""Estimates of a run's memory, time and cost before it is started."""
