"""Virtual time: devices, their links and absence, and the events that follow; all in whole nanoseconds."""
