"""Other hosts: hostfile, ssh, ways to start ranks there, work shared out over them."""
