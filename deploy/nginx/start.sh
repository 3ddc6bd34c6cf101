#!/bin/sh
# Starts nginx with the key that TorchServe wrote, and reloads it when that key, the tokens or the certificate change.
# start.sh [FOLDER of nginx.conf] [TorchServe's key file] [FOLDER to write to]
set -eu
conf=${1:-/etc/nginx}
keys=${2:-/run/torchserve/key_file.json}
write=${3:-/tmp}
umask 077

write_key() {
	key=$(sed -n '/"inference"/,/}/s/.*"key": *"\([^"]*\)".*/\1/p' "$keys" 2>/dev/null)
	[ -n "$key" ] && printf 'proxy_set_header Authorization "Bearer %s";\n' "$key" >"$write/torchserve_key.conf"
}

state() {
	cat "$keys" "$conf"/tokens/*.map "$conf"/tls/* "$conf"/*.conf 2>/dev/null | cksum
}

until write_key; do sleep 1; done
before=$(state)
nginx -p "$write" -c "$conf/nginx.conf" -g 'daemon off;' &
server=$!
trap 'kill -QUIT "$server"' TERM INT QUIT
while kill -0 "$server" 2>/dev/null; do
	sleep 5 &
	wait $! || true
	now=$(state)
	if [ "$now" != "$before" ] && write_key && nginx -q -t -p "$write" -c "$conf/nginx.conf"; then
		kill -HUP "$server"
		before=$now
	fi
done
wait "$server" || true
