"""Reading and writing files.

Files are parsed strictly and written whole. A folder is locked while a process writes to it.
"""
