"""What to report for a request that Pub/Sub has refused. Makes no call."""

from forwarder.faults import CREDENTIALS_REMEDY, Blame
from forwarder.recreated import create_topic
from forwarder.sink import Fault, FaultKind


def publish_fault(topic: str, code: str, details: str, blame: Blame) -> Fault:
    """Return the fault to report.

    Args:
        topic: ``projects/P/topics/T``.
        code: The gRPC status by name.
        details: The service's words.
        blame: Who has to act.
    """
    problem = f"publish to {topic}: {code}: {details}"
    if blame is Blame.NOBODY:
        return Fault(FaultKind.TRANSIENT, problem)
    project, name = topic.split("/")[1::2]
    return Fault(
        FaultKind.HOLD,
        problem,
        {
            "NOT_FOUND": create_topic(topic),
            "PERMISSION_DENIED": f"allow it: gcloud pubsub topics add-iam-policy-binding "
            f"{name} --project={project} --role=roles/pubsub.publisher "
            "--member=serviceAccount:ACCOUNT",
            "UNAUTHENTICATED": CREDENTIALS_REMEDY,
        }.get(code, f"look at it: gcloud pubsub topics describe {name} --project={project}"),
    )
