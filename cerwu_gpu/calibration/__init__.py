"""Statistics of a module's inputs and outputs over calibration data, by how they are obtained."""
