#!/bin/bash
# A real Apache Kafka and a real Mosquitto as plain processes on loopback, without Docker.
#
#   tools/brokers.sh setup    fetch Kafka with Maven into the cache (quick when it is there)
#   tools/brokers.sh start    start both and wait until they answer; implies setup
#   tools/brokers.sh stop     end exactly the processes that start began
#   tools/brokers.sh status   say what runs; exit 1 unless both do
#
# The cache is $STREAMER_CACHE, or .cache in the checkout; data, logs and pid files are in its
# `brokers` directory.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${STREAMER_CACHE:-$root/.cache}
state=$cache/brokers
kafka_address=127.0.0.1:19092
controller_address=127.0.0.1:19093
mqtt_port=18883
kafka_config=$state/kafka.properties
mqtt_config=$state/mosquitto.conf
java=(java -cp "$cache/kafka/*" -Xmx512m -Xms512m -XX:+UseG1GC)

say() { echo "brokers: $*"; }
die() { echo "brokers: $*" >&2; exit 1; }

need() { # need COMMAND DEBIAN-PACKAGE
    command -v "$1" >/dev/null || die "$1 is missing: apt-get install $2"
}

setup() {
    local pom=$root/tools/kafka-pom.xml stamp=$cache/kafka/pom.xml
    cmp -s "$pom" "$stamp" && return
    need java openjdk-17-jre-headless
    need mvn maven
    say "fetching Kafka with Maven into $cache/kafka"
    rm -rf "$cache/kafka.new"
    mkdir -p "$cache"
    mvn --batch-mode --quiet -Dstyle.color=never --file "$pom" dependency:copy-dependencies \
        -DincludeScope=runtime "-DoutputDirectory=$cache/kafka.new" >"$cache/maven.log" 2>&1 || {
        cat "$cache/maven.log" >&2 # it tells of errors on its standard output
        die "Maven could not fetch Kafka: see above"
    }
    cp "$pom" "$cache/kafka.new/pom.xml"
    # At once: a broker that runs may open one of its files only now.
    rm -rf "$cache/kafka"
    mv "$cache/kafka.new" "$cache/kafka"
    say "Kafka is there"
}

# The pid of the process that was started with this configuration file, if it still runs.
running() { # running NAME CONFIG
    local pid
    pid=$(cat "$state/$1.pid" 2>/dev/null) || return 1
    [ -r "/proc/$pid/cmdline" ] || return 1
    { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -qF -- "$2" && echo "$pid"
}

# Who answers there already would be taken for the one that is started, which then ends.
refuse_taken() { # refuse_taken NAME PORT...
    local port
    for port in "${@:2}"; do
        if (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            die "$1 cannot be started: another program has port $port of 127.0.0.1"
        fi
    done
}

launch() { # launch NAME COMMAND...
    local name=$1
    shift
    setsid "$@" </dev/null >>"$state/$name.log" 2>&1 &
    echo $! >"$state/$name.pid"
}

wait_for() { # wait_for NAME CONFIG PROBE
    local tries
    for tries in $(seq 300); do
        "$3" >/dev/null 2>&1 && return
        running "$1" "$2" >/dev/null || break
        sleep 0.2
    done
    tail -n 20 "$state/$1.log" >&2
    die "$1 does not answer; its log is $state/$1.log"
}

kafka_answers() { kcat -b "$kafka_address" -L -m 2; }
mqtt_answers() { timeout 2 mosquitto_pub -p "$mqtt_port" -q 1 -t brokers/probe -m up; }

configure_kafka() {
    {
        cat "$root/tools/kafka.properties"
        echo "listeners=PLAINTEXT://$kafka_address,CONTROLLER://$controller_address"
        echo "advertised.listeners=PLAINTEXT://$kafka_address"
        echo "controller.quorum.voters=1@$controller_address"
        echo "log.dirs=$state/kafka"
    } >"$kafka_config"
    [ -e "$state/kafka/meta.properties" ] ||
        "${java[@]}" kafka.tools.StorageTool format -t c3RyZWFtZXItYnJva2Vycw -c "$kafka_config" \
            >>"$state/kafka.log" 2>&1 || die "cannot format $state/kafka; see $state/kafka.log"
}

configure_mqtt() {
    cat >"$mqtt_config" <<-END
	# Started by root, Mosquitto would change to a user that cannot read this directory.
	user root
	persistence true
	persistence_location $state/mosquitto/
	allow_anonymous true
	listener $mqtt_port 127.0.0.1
	# A subscriber that is slower than the stream loses nothing.
	max_queued_messages 0
	END
}

start_kafka() {
    running kafka "$kafka_config" >/dev/null && return
    refuse_taken Kafka "${kafka_address#*:}" "${controller_address#*:}"
    say "starting Kafka"
    configure_kafka
    launch kafka "${java[@]}" kafka.Kafka "$kafka_config"
    wait_for kafka "$kafka_config" kafka_answers
}

start_mqtt() {
    running mosquitto "$mqtt_config" >/dev/null && return
    refuse_taken Mosquitto "$mqtt_port"
    say "starting Mosquitto"
    configure_mqtt
    launch mosquitto mosquitto -c "$mqtt_config"
    wait_for mosquitto "$mqtt_config" mqtt_answers
}

start() {
    need kcat kcat
    need mosquitto mosquitto
    need mosquitto_pub mosquitto-clients
    setup
    mkdir -p "$state/mosquitto"
    start_kafka
    start_mqtt
    cat <<END
Kafka      $kafka_address       kcat -C -b $kafka_address -t kernel-events -o end
Mosquitto  127.0.0.1:$mqtt_port       mosquitto_sub -p $mqtt_port -t 'kernel/#' -N
END
}

stop_one() { # stop_one NAME CONFIG
    local pid tries
    if pid=$(running "$1" "$2"); then
        say "stopping $1 ($pid)"
        kill "$pid"
        for tries in $(seq 100); do
            running "$1" "$2" >/dev/null || break
            sleep 0.1
        done
        running "$1" "$2" >/dev/null && kill -KILL "$pid"
    fi
    rm -f "$state/$1.pid"
}

status() {
    local name config pid missing=0
    for name in kafka mosquitto; do
        config=$kafka_config
        [ "$name" = kafka ] || config=$mqtt_config
        if pid=$(running "$name" "$config"); then
            say "$name runs ($pid)"
        else
            say "$name does not run"
            missing=1
        fi
    done
    return $missing
}

case "${1:-}" in
setup) setup ;;
start) start ;;
stop)
    stop_one kafka "$kafka_config"
    stop_one mosquitto "$mqtt_config"
    ;;
status) status ;;
*) die "usage: tools/brokers.sh setup|start|stop|status" ;;
esac
