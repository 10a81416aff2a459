"""Tools beside the way of the data: looking into files, timing, checking."""
