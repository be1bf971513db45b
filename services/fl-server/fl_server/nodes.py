"""Which hospitals' nodes the SuperLink knows, kept equal to what the gateway wants.

A hospital's node key comes to the gateway with its join; here it is registered at the SuperLink, and unregistered when the
hospital is revoked or leaves. The SuperLink's own id of a node, and whether it is online, go back to the gateway, which
makes connects and disconnects of it. Flower never takes a key again that was once unregistered, so only an explicit word of
the gateway unregisters one, never its absence from a list.
"""

from dataclasses import dataclass

import structlog

from fl_server.flower import NodeKeySpent, NodeState, NodeUnknown, SuperLink
from medhive.client import GatewayClient
from medhive.errors import InvalidInput
from medhive.wire import API, NodeAnswer, NodeReport

log = structlog.get_logger()


@dataclass(frozen=True)
class _Known:
    """What was last told to the gateway of a site's node, and the key it is of."""

    public_key: str
    report: NodeReport


class NodeRegistry:
    """Brings SuperLink and gateway together, one pass at a time."""

    def __init__(self, gateway: GatewayClient, superlink: SuperLink) -> None:
        self._gateway = gateway
        self._superlink = superlink
        self._told: dict[str, _Known] = {}
        self._hopeless: set[str] = set()

    def sync(self) -> None:
        """One pass.

        Raises:
            Unreachable: gateway or SuperLink do not answer; the next pass goes on.
        """
        rows = [NodeAnswer.model_validate(row) for row in self._gateway.get(f"{API}/server/nodes")]
        registered = {node.node_id: node for node in self._superlink.nodes()}
        for row in rows:
            report = self._wanted(row, registered) if row.wanted else self._unwanted(row, registered)
            self._tell(row, report)

    def _wanted(self, row: NodeAnswer, registered: dict[int, NodeState]) -> NodeReport:
        known = self._told.get(row.site)
        node_id = _number(known.report.node_id) if known and known.public_key == row.node_public_key else None
        if node_id not in registered:
            node_id = self._register(row)
        if node_id is None:
            return NodeReport()
        node = registered.get(node_id)
        return NodeReport(node_id=str(node_id), online=node is not None and node.online)

    def _register(self, row: NodeAnswer) -> int | None:
        if row.node_public_key in self._hopeless:
            return None
        try:
            node_id = self._superlink.register_node(row.node_public_key.encode())
        except (NodeKeySpent, InvalidInput) as error:
            self._hopeless.add(row.node_public_key)
            log.warning("node.refused", site=row.site, reason=str(error))
            return None
        log.info("node.registered", site=row.site)
        return node_id

    def _unwanted(self, row: NodeAnswer, registered: dict[int, NodeState]) -> NodeReport:
        node_id = _number(row.node_id) or self._by_key(row.node_public_key, registered)
        if node_id in registered and node_id is not None:
            self._unregister(node_id)
            log.info("node.unregistered", site=row.site)
        return NodeReport()

    def _unregister(self, node_id: int) -> None:
        try:
            self._superlink.unregister_node(node_id)
        except NodeUnknown:
            log.debug("node.unknown")

    @staticmethod
    def _by_key(public_key: str, registered: dict[int, NodeState]) -> int | None:
        key = public_key.encode()
        return next((node_id for node_id, node in registered.items() if node.public_key == key), None)

    def _tell(self, row: NodeAnswer, report: NodeReport) -> None:
        known = _Known(row.node_public_key, report)
        if self._told.get(row.site) != known:
            self._gateway.put(f"{API}/server/nodes/{row.site}", report)
            self._told[row.site] = known


def _number(node_id: str | None) -> int | None:
    return int(node_id) if node_id is not None else None
