"""Make the float graph easier to quantize at few bits. The function stays the same, up to reassociation."""
