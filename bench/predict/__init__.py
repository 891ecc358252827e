"""What the compiled kernels let expect of the rows with a number to reach: a static model. Installed by nobody."""
