"""Run directories in object stores: a local folder for the work, and its copy below an address.

    <address>/config.yaml ...             small files, uploaded again whenever they have changed
    <address>/checkpoints/<step>/...      the files of a checkpoint
    <address>/checkpoints/frozen/...      the frozen parameters
    <address>/committed/<step>            names, sizes and checksums of the files of a checkpoint
    <address>/run.lock                    the process that trains here
    <address>/last_writer                 the local folder whose files these are

Stores have neither renames nor folders. An object appears whole or not at all, but a checkpoint has
many. So the record below `committed/` is written last, and only a checkpoint that has one counts.
"""
