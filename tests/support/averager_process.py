"""The aggregator's averager as a process of its own, so that a test can kill it: ADDRESS CA TOKEN KEY_ID FOLDER."""

import sys
import threading
from pathlib import Path

from fl_server.logs import log_json
from fl_server.queues import Averager
from medhive.client import GatewayClient, Trust

address, ca_file, token, key_id, folder = sys.argv[1:]
log_json()
gateway = GatewayClient(address, Trust(extra_ca_file=Path(ca_file)), token)
Averager(
    gateway=gateway,
    holder="averager",
    coordinator_key_ids=lambda: (key_id,),
    folder=Path(folder),
    say=lambda line: print(line, flush=True),
    stopped=threading.Event(),
).serve()
