"""From files on disk to geometry and pixels."""
