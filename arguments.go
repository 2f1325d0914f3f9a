package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"outbox-relay/internal/config"
	"outbox-relay/ops"
)

// parse reads flags, which may stand before, between and behind the other
// arguments, and returns those.
func parse(args []string, define func(*flag.FlagSet)) (others []string, err error) {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	define(flags)
	for {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		if args = flags.Args(); len(args) == 0 {
			return others, nil
		}
		others, args = append(others, args[0]), args[1:]
	}
}

// parseOnly is parse for a command that takes nothing but flags.
func parseOnly(args []string, define func(*flag.FlagSet)) error {
	others, err := parse(args, define)
	if err == nil && len(others) > 0 {
		err = fmt.Errorf("unknown argument %q", others[0])
	}
	return err
}

func plain(do action) func([]string) (action, error) {
	return func(args []string) (action, error) { return do, parseOnly(args, func(*flag.FlagSet) {}) }
}

func parseMigrate(args []string) (action, error) {
	show, partitioned := false, false
	err := parseOnly(args, func(f *flag.FlagSet) {
		f.BoolVar(&show, "print", false, "")
		f.BoolVar(&partitioned, "partitioned", false, "")
	})
	return func(ctx context.Context, cfg config.Config, std streams) error {
		target := target(cfg)
		target.Partitioned = partitioned
		if show {
			return printMigrations(target, std)
		}
		return migrate(ctx, cfg, target, std)
	}, err
}

func parseStatus(args []string) (action, error) {
	asJSON := false
	err := parseOnly(args, func(f *flag.FlagSet) { f.BoolVar(&asJSON, "json", false, "") })
	return func(ctx context.Context, cfg config.Config, std streams) error {
		return admin(cfg, std).Status(ctx, asJSON)
	}, err
}

func parseDoctor(args []string) (action, error) {
	asJSON := false
	err := parseOnly(args, func(f *flag.FlagSet) { f.BoolVar(&asJSON, "json", false, "") })
	return func(ctx context.Context, cfg config.Config, std streams) error {
		return ops.Doctor{Config: relayConfig(cfg), Migrate: target(cfg), Out: std.out}.Run(ctx, asJSON)
	}, err
}

func parseRetry(args []string) (action, error) {
	all := false
	ids, err := parse(args, func(f *flag.FlagSet) { f.BoolVar(&all, "all", false, "") })
	if err == nil && all == (len(ids) > 0) {
		err = errors.New("it takes either ids or --all")
	}
	return func(ctx context.Context, cfg config.Config, std streams) error {
		if all {
			return admin(cfg, std).RetryEvery(ctx)
		}
		return admin(cfg, std).RetryRows(ctx, ids)
	}, err
}

func parsePark(args []string) (action, error) {
	const flag = "--gone" // anywhere: a reason may have other words that begin with a hyphen
	gone := slices.Contains(args, flag)
	args = slices.DeleteFunc(slices.Clone(args), func(arg string) bool { return arg == flag })
	if len(args) == 0 || args[0] == "" || args[0][0] == '-' {
		return nil, errors.New("it takes an id, and a reason")
	}
	return func(ctx context.Context, cfg config.Config, std streams) error {
		return admin(cfg, std).Park(ctx, args[0], strings.Join(args[1:], " "), gone)
	}, nil
}

func parseReplay(args []string) (action, error) {
	var r ops.Replay
	err := parseOnly(args, func(f *flag.FlagSet) {
		f.Func("from", "", timeFlag(&r.From))
		f.Func("to", "", timeFlag(&r.To))
		f.StringVar(&r.AggregateType, "aggregate-type", "", "")
		f.StringVar(&r.EventType, "event-type", "", "")
		f.Func("id", "", func(id string) error {
			r.IDs = append(r.IDs, id)
			return nil
		})
		f.StringVar(&r.Run, "run", "", "")
		f.StringVar(&r.After, "after", "", "")
		f.BoolVar(&r.All, "all", false, "")
		f.BoolVar(&r.DryRun, "dry-run", false, "")
		f.BoolVar(&r.Yes, "yes", false, "")
	})
	return func(ctx context.Context, cfg config.Config, std streams) error {
		return admin(cfg, std).Replay(ctx, r)
	}, err
}

func timeFlag(t *time.Time) func(string) error {
	return func(text string) (err error) {
		if *t, err = time.Parse(time.RFC3339, text); err == nil {
			return nil
		}
		if *t, err = time.Parse(time.DateOnly, text); err != nil {
			return errors.New("want a time such as 2026-11-24T15:30:00Z, or a date")
		}
		return nil
	}
}

func parseDrop(args []string) (action, error) {
	force := false
	slots, err := parse(args, func(f *flag.FlagSet) { f.BoolVar(&force, "force", false, "") })
	if err == nil && len(slots) != 1 {
		err = errors.New("it takes the slot's name")
	}
	return func(ctx context.Context, cfg config.Config, std streams) error {
		return admin(cfg, std).Drop(ctx, slots[0], force)
	}, err
}
