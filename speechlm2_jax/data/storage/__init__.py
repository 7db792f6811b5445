"""Files wherever they are: paths of this machine, and addresses of stores and web servers.

What may be read is checked where a name is met and where it is opened.
"""
