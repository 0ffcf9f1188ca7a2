"""Export to other runtimes. The exporter is not part of this version."""
