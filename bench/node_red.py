"""Node-RED as a plant would use it: MQTT in, a function node that publishes to Pub/Sub.

It stores nothing. Installed by npm into ``bench/.node-red``, once.
"""

import json
import shutil
import subprocess
from pathlib import Path

from bench.processes import ROOT, BenchError, Process
from bench.rig import Rig, free_port
from bench.servers import PROJECT
from bench.system import TOPIC, Services

PACKAGES = ("node-red@4.1", "@google-cloud/pubsub@4")
INSTALL_TIMEOUT_S = 600.0
START_TIMEOUT_S = 60.0
_HOME = ROOT / "bench" / ".node-red"

_SETTINGS = """\
const {{ PubSub }} = require({client});
const topic = new PubSub({{ projectId: {project} }}).topic({topic}, {{ messageOrdering: true }});
module.exports = {{
  uiHost: "127.0.0.1", uiPort: {port}, flowFile: "flows.json",
  functionGlobalContext: {{ topic: topic }},
}};
"""

_FUNCTION = """\
const reading = JSON.parse(msg.payload);
const event = {
  site_code: reading.site_code,
  kpi_name: msg.topic.split("/")[4],
  sensor_id: reading.sensor_id,
  timestamp: reading.timestamp,
  value: reading.value,
};
global.get("topic").publishMessage({
  data: Buffer.from(JSON.stringify(event)),
  orderingKey: reading.site_code,
  attributes: { site_code: reading.site_code },
}).catch((error) => node.error(error));
return null;
"""


def installed() -> bool:
    """Install it if need be; return whether it is there (it is not where npm is missing).

    Raises:
        BenchError: npm could not install it.
    """
    if (_HOME / ".complete").exists():
        return True
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        return False
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(_HOME), *PACKAGES]
    done = subprocess.run(  # noqa: S603 - our own argument list
        command, check=False, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S
    )
    if done.returncode != 0:
        raise BenchError(f"npm cannot install Node-RED: {done.stderr[-1000:]}")
    (_HOME / ".complete").touch()
    return True


def start(setup: Rig, services: Services) -> Process:
    """Start it; return once it is connected to the broker."""
    home = setup.directory / "node-red"
    home.mkdir()
    modules = _HOME / "node_modules"
    settings = _SETTINGS.format(
        client=json.dumps(str(modules / "@google-cloud" / "pubsub")),
        project=json.dumps(PROJECT),
        topic=json.dumps(TOPIC),
        port=free_port(),
    )
    (home / "settings.js").write_text(settings, encoding="utf-8")
    (home / "flows.json").write_text(json.dumps(_flow(setup.broker_port)), encoding="utf-8")
    command = ["node", str(modules / "node-red" / "red.js"), "--userDir", str(home)]
    process = setup.start(Process("node-red", command, setup.directory, services.environ()))
    process.wait_output("Connected to broker", START_TIMEOUT_S)
    return process


def version() -> str:
    """Return the version that is installed."""
    package = _HOME / "node_modules" / "node-red" / "package.json"
    return str(json.loads(Path(package).read_text(encoding="utf-8"))["version"])


def _flow(broker_port: int) -> list[dict[str, object]]:
    return [
        {"id": "gate", "type": "tab", "label": "gate"},
        {
            "id": "broker",
            "type": "mqtt-broker",
            "broker": "127.0.0.1",
            "port": str(broker_port),
            "clientid": "node-red",
            "autoConnect": True,
            "protocolVersion": "4",
            "keepalive": "60",
            "cleansession": False,
        },
        {
            "id": "in",
            "type": "mqtt in",
            "z": "gate",
            "topic": "FCTS/FAE/+/SolvExtract/+",
            "qos": "1",
            "datatype": "utf8",
            "broker": "broker",
            "wires": [["publish"]],
        },
        {
            "id": "publish",
            "type": "function",
            "z": "gate",
            "func": _FUNCTION,
            "outputs": 0,
            "wires": [],
        },
    ]
