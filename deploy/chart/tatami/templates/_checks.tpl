{{/* What a chart can know to be wrong, and a schema cannot. */}}
{{- define "tatami.checks" -}}
{{- $kinds := list -}}
{{- if .Values.hostpath.enabled -}}
{{- $kinds = append $kinds "hostpath" -}}
{{- include "tatami.checks.hostpath" . -}}
{{- end -}}
{{- if include "tatami.nfs.enabled" . -}}
{{- $kinds = append $kinds "nfs" -}}
{{- include "tatami.checks.nfs" . -}}
{{- end -}}
{{- if not $kinds }}{{ fail "nothing to install: hostpath.enabled is false, and nfs.pools has no pool" }}{{ end -}}
{{- include "tatami.checks.path" (dict "name" "kubeletDir" "path" .Values.kubeletDir) -}}
{{- $defaults := list -}}
{{- range $kind := $kinds -}}
{{- $values := index $.Values $kind -}}
{{- include "tatami.checks.sockets" (dict "root" $ "kind" $kind "driver" $values.driverName) -}}
{{- if and $values.defaultPool (not (hasKey $values.pools $values.defaultPool)) }}{{ fail (printf "%s.defaultPool: %s is none of %s.pools" $kind $values.defaultPool $kind) }}{{ end -}}
{{- range $values.storageClasses -}}
{{- if and .pool (not (hasKey $values.pools .pool)) }}{{ fail (printf "%s.storageClasses: %s: %s is none of %s.pools" $kind .name .pool $kind) }}{{ end -}}
{{- if .default }}{{ $defaults = append $defaults .name }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if gt (len $defaults) 1 }}{{ fail (printf "storageClasses: a cluster has one default class, and here are several: %s" (join ", " $defaults)) }}{{ end -}}
{{- end -}}

{{- define "tatami.checks.hostpath" -}}
{{- if not .Values.hostpath.pools }}{{ fail "hostpath.pools: at least one pool is needed, or hostpath.enabled=false" }}{{ end -}}
{{- $places := dict "kubeletDir" .Values.kubeletDir -}}
{{- range $name, $pool := .Values.hostpath.pools -}}
{{- $field := printf "hostpath.pools.%s.path" $name -}}
{{- include "tatami.checks.path" (dict "name" $field "path" $pool.path) -}}
{{- include "tatami.checks.image" (dict "name" $field "path" $pool.path "own" list) -}}
{{- $places = set $places $field $pool.path -}}
{{- end -}}
{{- include "tatami.checks.apart" $places -}}
{{- end -}}

{{- define "tatami.checks.nfs" -}}
{{- $controller := .Values.nfs.controller -}}
{{- $port := $controller.metricsPort -}}
{{- if and $port $controller.hostNetwork (eq (toString $port) (toString .Values.nfs.node.metricsPort)) -}}
{{ fail (printf "nfs.controller.metricsPort: %v is nfs.node.metricsPort, too, and both are ports of the host: give the controller another" $port) }}
{{- end -}}
{{- $data := dict -}}
{{- range $name, $pool := .Values.nfs.pools -}}
{{- include "tatami.checks.path" (dict "name" (printf "nfs.pools.%s.path" $name) "path" $pool.path) -}}
{{- if and (has "nolock" ($pool.options | default list)) (gt (int $controller.replicas) 1) -}}
{{ fail (printf "nfs.pools.%s.options: with nolock no server keeps two controllers apart: set nfs.controller.replicas=1, or use vers=4.2 without nolock" $name) }}
{{- end -}}
{{- with $pool.data -}}
{{- $field := printf "nfs.pools.%s.data" $name -}}
{{- include "tatami.checks.path" (dict "name" $field "path" .) -}}
{{- include "tatami.checks.image" (dict "name" $field "path" . "own" (list "/var/lib/tatami")) -}}
{{- $data = set $data $field . -}}
{{- if not (or $controller.nodeSelector $controller.affinity) -}}
{{ fail "nfs.pools: a pool has `data`, so the controller has to run on the server's machine: say so in nfs.controller.nodeSelector" }}
{{- end -}}
{{- end -}}
{{- $places := dict (printf "nfs.pools.%s.path" $name) $pool.path -}}
{{- range $other, $its := $.Values.nfs.pools -}}
{{- if eq $its.server $pool.server }}{{ $places = set $places (printf "nfs.pools.%s.path" $other) $its.path }}{{ end -}}
{{- end -}}
{{- include "tatami.checks.apart" $places -}}
{{- end -}}
{{- include "tatami.checks.apart" $data -}}
{{- end -}}

{{/* dict "name" its field "path" ... */}}
{{- define "tatami.checks.path" -}}
{{- if has ".." (splitList "/" .path) }}{{ fail (printf "%s: %s must not contain '..'" .name .path) }}{{ end -}}
{{- end -}}

{{/* A path of the host that is mounted at the same place in the driver's container would hide what the image or the pod has there:
     dict "name" its field "path" ... "own" further places of the pod */}}
{{- define "tatami.checks.image" -}}
{{- $path := printf "%s/" (clean .path) -}}
{{- range concat (list "/bin" "/csi" "/dev" "/etc/tatami" "/lib" "/lib64" "/opt/tatami" "/proc" "/run" "/sbin" "/sys" "/tmp" "/usr") .own -}}
{{- if hasPrefix $path (printf "%s/" .) }}{{ fail (printf "%s: %s would hide %s of the driver's container: take a directory of its own, such as one below it" $.name $.path .) }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* No directory may be another or lie above or below it: a dict of fields and their paths */}}
{{- define "tatami.checks.apart" -}}
{{- range $name, $path := . -}}
{{- range $other, $its := $ -}}
{{- if and (ne $name $other) (hasPrefix (printf "%s/" (clean $its | trimSuffix "/")) (printf "%s/" (clean $path | trimSuffix "/"))) -}}
{{- /* The one below is told of, but for the kubelet's directory, which is where it is. */ -}}
{{- $told := list $name $other -}}
{{- if eq $name "kubeletDir" }}{{ $told = list $other $name }}{{ end -}}
{{ fail (printf "%s: %s must be neither %s (%s) nor above or below it" (first $told) (index $ (first $told)) (last $told) (index $ (last $told))) }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* unix(7): a socket's path has at most 107 bytes. dict "root" $ "kind" "nfs" "driver" its name */}}
{{- define "tatami.checks.sockets" -}}
{{- $plugin := printf "%s/csi.sock" (include "tatami.pluginDir" .) -}}
{{- range list $plugin (include "tatami.registrationSocket" .) -}}
{{- if gt (len .) 107 }}{{ fail (printf "%s.driverName: %s has %d bytes, and the path of a Unix socket at most 107 (unix(7)): take a shorter name" $.kind . (len .)) }}{{ end -}}
{{- end -}}
{{- end -}}
