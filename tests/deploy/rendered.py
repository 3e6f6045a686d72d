"""Looking for objects in what the chart renders."""

WORKLOADS = ("DaemonSet", "Deployment")


def of_kind(objects, *kinds):
    return [found for found in objects if found["kind"] in kinds]


def named(objects, kind, name):
    (found,) = (found for found in of_kind(objects, kind) if found["metadata"]["name"] == name)
    return found


def containers(objects):
    """Yield (workload's name, its pod, container)."""
    for workload in of_kind(objects, *WORKLOADS):
        pod = workload["spec"]["template"]["spec"]
        for container in pod["containers"]:
            yield workload["metadata"]["name"], pod, container


def driver_of(objects, name):
    (found,) = (c for workload, _, c in containers(objects) if workload == name and c["name"] == "driver")
    return found
