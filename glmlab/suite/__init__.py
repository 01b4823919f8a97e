"""The suite around the notebooks: run them, list them, export them, check the machine."""
