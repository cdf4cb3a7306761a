"""Multi-host support: hostfiles, ssh, rank launchers, and work split over hosts."""
