"""What a real GPU shows: runs that are recorded once and kept, so that forecasts can be held against them anywhere."""
