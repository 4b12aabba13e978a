"""Pure tensor math that two or more slices need. Imports torch only."""
