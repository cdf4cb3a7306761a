"""What a run is and what it leaves on disk: recipe and run directory. No torch."""
