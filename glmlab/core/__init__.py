"""What every room needs: errors, units, packaged data, files, the Curve, graphics cards."""
