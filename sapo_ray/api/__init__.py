"""What goes over the wire between client, control plane and driver. Nothing here but shapes."""
