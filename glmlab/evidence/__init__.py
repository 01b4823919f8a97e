"""What real GPUs show: runs that are recorded once and kept, so that forecasts can be compared with them anywhere."""
