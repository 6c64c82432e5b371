"""Where things are: boxes on grids, anchors, regions of objects, and which prediction goes with which."""
