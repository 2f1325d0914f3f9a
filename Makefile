# What the tests need beside Go, a C compiler and Node.js with npm, they bring: Postgres
# by npm where the machine has none of 15 or newer; psql, PgBouncer, Chromium, Prometheus
# and systemd-analyze out of Debian's packages.

GO ?= go
# Whatever is built without the race detector is built one way, as a release is:
# then the tests, the programs that they start, and lint compile it once.
export CGO_ENABLED = 0
export GOFLAGS := -trimpath $(GOFLAGS)
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
VERSIONS ?= 15 16 17 18

# The packages whose tests depend on the version of Postgres.
INTEGRATION = ./checkpoint ./decoder ./migrations ./ops ./outbox ./replication ./relay
# Tests of these that take long, or have no relay with the race detector (it is no
# static binary), and whose outcome does not.
SAME = ^(TestRunsInAContainer|TestPage|TestPageIsReadOnlyWithoutToken|TestOutagesAreNoStall|TestMigrateShowsProgress|TestRunShowsBackfillAndDraining|TestReplayShowsProgress|TestTrackerAgainstModel|TestGoldenSession.*|TestBackfillKilledAtRandomMoments|TestLinkToNATSCutWithThousandsInFlight|TestTransactionOfAMillionEvents|TestNATSDownUnderLoad|TestWalsenderHearsFromTheRelay|TestSlotIsHeldOnEveryPath|TestWalsenderEndsWhileNATSIsDown|TestIdleRelayLetsAnIdleDatabaseRest|TestBackfillInFlatMemory|TestBackfillOfLargeRowsInFlatMemory|TestRetryOfLargeRowsInFlatMemory|TestLateCopiesLandWhileMatching|TestReplayKilledAtRandomMoments|TestSlotLostUnderLoad)$$

.PHONY: test test-plain test-race test-deploy test-versions chaos lint bench bench-quick build release release-check demo pictures

## test: all tests. The programs that they start are compiled before, not by several
## tests at once
test: test-deploy
	$(GO) build ./...
	$(MAKE) -j 2 --no-print-directory test-plain test-race

# Most tests of ./relay start the relay, as its users have it, and wait for it, four at a time. The
# race detector would only watch the embedded NATS server, and take half the CPU.
# ./decoder has no goroutines.
test-plain:
	$(GO) test -timeout 45m -parallel 4 ./relay ./decoder

test-race:
	CGO_ENABLED=1 $(GO) test -race -timeout 30m $(shell $(GO) list ./... | grep -v -E '/(decoder|relay)$$')

## test-deploy: the Kubernetes manifests and the Helm chart; a module of its own, and
## without vet, which would look at all of Kubernetes
test-deploy:
	cd internal/deploytest && $(GO) test -vet=off ./...

## test-versions: the integration tests on each supported version of Postgres, with
## the race detector in the relays that they start. They wait more than they work
test-versions: $(addprefix test-version-,$(VERSIONS))

test-version-%:
	POSTGRES_VERSION=$* RELAY_RACE=1 $(GO) test -count=1 -timeout 30m -parallel 4 -skip '$(SAME)' $(INTEGRATION)

## chaos: the promise under faults, half of the seasons on seasoned databases.
## CHAOS_SEED repeats a run, CHAOS_RATE sets rows a second, CHAOS_NATS_VERSION
## (v2.12.0) another nats-server, POSTGRES_VERSION another Postgres, CHAOS_ONLY the
## kinds of faults whose name matches
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

## pictures: those of the status page and the demo in docs
pictures:
	STATUS_SCREENSHOT=$(CURDIR)/docs/status.png $(GO) test -count=1 -run '^TestPage$$' ./ops
	$(GO) run ./internal/pictures docs/demo.svg $(GO) run ./demo

## build: the relay as a static binary
build:
	$(GO) build -ldflags "-s -w" -o outbox-relay .

## release: what is published of the commit's tag, in dist
release:
	$(GO) run ./internal/release

## release-check: builds it twice, the second time in a clone and with nothing cached
release-check: release
	rm -rf dist/check && git clone --quiet . dist/check/clone
	cd dist/check/clone && GOCACHE=$(CURDIR)/dist/check/cache $(GO) run ./internal/release
	cmp dist/SHA256SUMS dist/check/clone/dist/SHA256SUMS
	rm -rf dist/check
