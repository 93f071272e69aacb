"""Make the float graph easier to quantize at few bits. The same function, reassociated."""
