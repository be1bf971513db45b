"""Where Flower looks for the ServerApp."""

from fl_server.flower import serverapp_entry

app = serverapp_entry()
