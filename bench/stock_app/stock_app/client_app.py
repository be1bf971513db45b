"""Training that takes no time: every tensor comes back changed, since Flower would not send an equal one again.

Only numpy is imported; a real app would import its training library anew for every message.
"""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, _context: Context) -> Message:
    """Add a random number to every tensor."""
    shift = np.float32(np.random.default_rng().standard_normal())
    arrays = ArrayRecord({name: Array(array.numpy() + shift) for name, array in message.content["arrays"].items()})
    return Message(
        content=RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message
    )
