"""What three or more lessons use unchanged; everything that is the subject of a lesson stands in its script."""
