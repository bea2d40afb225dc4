"""The operators for a CPU in C, one file each, built where they are first called (build.py)."""
