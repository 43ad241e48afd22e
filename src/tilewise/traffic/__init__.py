"""FLOPs and bytes between slow and fast memory: in closed form (`tilewise.costs`), counted, measured (`docs/traffic.md`)."""
